"""Dataset readers: one module per benchmark, imported by name (`data.source`).

    read(root, split, *, prompt, max_samples, bad_records, **options) -> list[Example]
        root: the folder of the official files.
        split: the split's name, with an optional slice in file order (`splits.py`): `train[:10%]`.
        prompt: the template of the model's input, with `{question}`.
        max_samples: limit on the number of questions (of images, for captions), from the start of the slice.
        bad_records: policy for records that cannot be used (default: stop).
        options: the reader's own, from `data.options`.
        Raises an InputError if files are missing or cannot be read, or a record cannot be used.
    write_submission(path, answers)       writes the benchmark's results file

Optional:

    files(root, split, **options)         returns all files and folders that `read` depends on; enables the cache
    arrange(examples, split, **options)   converts examples of the hub's parquet form
    scoring(root, split)                  returns options of the metric
    submission_name(id)                   converts a question's id for the results file
    HAS_QUESTIONS = False                 declares a benchmark without questions
"""
