"""Where people look at faces and decide, on local pages (`pip install "faceprior[pages]"`), and the tables of it.

    python -m faceprior.human_eval make FOLDER --models NAME=SOURCE ... --prompts FILE    # images for `rank`
    python -m faceprior.human_eval rank FOLDER                     # people rank the images of three models
    python -m faceprior.human_eval tables FOLDER [--output DIR]    # Tables 1 to 4 of Face Score, mean ranks (AuthFace)

    python -m faceprior.human_eval compare FOLDER                  # people compare two images of a face at a time
    python -m faceprior.human_eval preferences FOLDER              # the table of their answers (AuthFace, Table 5)

    python -m faceprior.human_eval review data/portraits           # a person reviews the portraits of stage 3

Each command has the module of its name. `files` documents and reads the folders, `pages` is what the pages share,
`agreement` turns votes into labels and compares metrics with them, `metrics` are the metrics that may be on this
machine, `scores` measures them. Rankings and preferences that exist are enough for the tables: the pages are one way to
get them.
"""
