"""From official files to batches.

    files --read--> Examples (image + its questions, grouped by image)        vqav2.py, shapes.py
    image --decode, to_tensor--> float[3, H, H], in the DataLoader's workers   images.py
    question --tokenize--> prompt and answer token ids                         batch.py, tokenizer.py
    Examples --plan of an epoch--> rows: which documents share one, in which order      training_set.py, packing.py
    rows --collate--> pixel_values float[I, 3, H, H], the [B, T] columns of sequence/rows.py         batch.py

Legend: B rows, T tokens a row, I images, H image height and width.
"""
