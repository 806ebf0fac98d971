"""From official files to batches.

    files --read--> Examples (image + its questions, grouped by image)        vqav2.py, shapes.py
    image --decode, to_tensor--> float[3, H, H], in the DataLoader's workers   images.py
    question --tokenize--> prompt and answer token ids                         batch.py, tokenizer.py
    Examples --collate--> pixel_values float[I, 3, H, H], the int64[B, T] columns of sequence/rows.py

Legend: B rows, T tokens a row, I images, H image height and width.
"""
