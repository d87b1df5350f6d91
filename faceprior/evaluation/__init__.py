"""The evaluation of restorers and generators: methods, what is measured of their images, and the tables of it.

    methods     NAME=SOURCE: a model, the input as it is, or a folder of finished images
    items       what every method gets: a degraded face with or without its reference, or a prompt and a seed
    rows        rows.jsonl: one row per (protocol, method, item), with the image and what was measured of it
    measures    the measures, each with its words for a table and the way to get its weights
    measuring   every row gets the measures that it lacks
    figures     mean, median, 95% interval and paired test of each method and measure
    tables      JSON, CSV, Markdown and LaTeX of the figures, beside what was published

`restoration` and `generation` are the two protocols that make images. Stage 7 joins the parts.
"""
