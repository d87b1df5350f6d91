"""
The models in checkpoints/tiny: how they are trained, and how they are measured.

    python -m checkpoints.tiny_models.make_tiny     # trains them: hours on a CPU, in pieces (`make tiny`)
    python -m checkpoints.tiny_models.figures       # measures them on test seeds (`make figures`)
    python -m checkpoints.tiny_models.curation      # measures the gates of stage 3, which need no model

Training:   make_tiny (the steps in order), data (drawn images), vae, bases (sd15, sdxl), features, damage (how a face
            is spoiled), ladders (faces from best to worst), judge (a ConvNet, for measuring only), reward (the BLIP
            model), stages (what the seven stages do), readme (checkpoints/tiny/README.md)
Measuring:  figures (the pieces in order), bench (models and test images), faces (judges of a face), table (estimates
            and rows), figures_bases, figures_scorer, figures_ladders, figures_tuning, figures_restorer, strips (the
            README's images)

Not a part of the faceprior package: run it from the top of the checkout.
"""

import faceprior  # noqa: F401  first: it silences bitsandbytes, which diffusers loads
