"""The report: one HTML file, images embedded, that shows what each stage made below a folder.

    python -m faceprior.report results/demo                  # writes results/demo/report.html
    python -m faceprior.report . runs/guided runs/eval       # with what stages wrote that were given `--output`

It reads what exists. A stage that was not run is named with its command; a file that cannot be read is named at the
end, and the rest is written.

`run` reads the files. Per section, a module (`pairs`, `scorer`, ...) computes what is shown, as plain data, and
templates/*.html, which escape all of it, say how; `charts` computes the geometry of the SVG charts. `page` puts the
sections together.
"""

from faceprior.report.page import write_evaluation, write_report

__all__ = ["write_evaluation", "write_report"]
