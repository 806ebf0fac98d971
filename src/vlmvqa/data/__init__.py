"""Data: from a benchmark's files to the batches that the model reads.

The path of one question, from file to batch:

    record in a file  -> Question: text, prompt, answers; in an Example: image path and its questions datasets/
    list[Example]     -> columns in the disk cache, which the next run loads instead of parsing       cache.py
    prompt, answer    -> token ids in the TokenTable, all texts of the split in one call              tokenization.py
    Example           -> DocumentSpans: which of its questions share one document                     train_dataset.py
    all DocumentSpans -> Plan of an epoch: which documents share a row, in which order                packing.py
    DocumentSpan      -> Document: image float[3, H, H] (images.py) and TokenizedQuestions            processor.py
    rows of Documents -> batch: pixel_values float[I, 3, H, H], [B, T] columns (sequence/rows.py)     processor.py

Evaluation has no plan: `EvalDataset` (eval_dataset.py) turns each Example into one Document. Images are decoded in the
DataLoader's workers, which read a Document at a time.

Legend: B rows, T tokens per row, I images, H image height and width.
"""
