"""The human evaluation of a metric for faces: Tables 1 to 4 of Face Score (arXiv 2406.17100) for a benchmark folder.

    python -m faceprior.human_eval rank FOLDER                     # people rank the images on a local page
    python -m faceprior.human_eval tables FOLDER [--output DIR]    # the tables of their rankings and of the metrics

`files` documents and reads the folder, `pages` is the local page, `agreement` turns votes into labels and compares
metrics with them, `metrics` are the metrics that may be on this machine, `scores` measures them, `tables` writes the
tables. Rankings that exist are enough for `tables`: the page (`pip install "faceprior[pages]"`) is one way to get them.
"""
