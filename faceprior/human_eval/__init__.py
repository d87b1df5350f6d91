"""The human evaluation of a metric for faces: Tables 1 to 4 of Face Score (arXiv 2406.17100) for any benchmark folder.

python -m faceprior.human_eval.pages rank FOLDER       # people rank images on a local page
python -m faceprior.human_eval.tables FOLDER           # the tables from their rankings
"""
