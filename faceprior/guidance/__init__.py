"""`GuidanceTuner`: teach a Stable Diffusion checkpoint to generate better faces from (good, bad) pairs (Face Score, 5).

    tuner = GuidanceTuner.from_pretrained("my_model.safetensors", train="lora")
    tuner.fit("data/pairs", steps=500)
    tuner.save_pretrained("checkpoints/guided")     # a LoRA that any diffusers pipeline loads

`tuned` says which weights are trained, keeps the original ones beside them, and writes files; `objectives` has the
losses; `tuner` trains in one call; `loading` reads what was written. Stage 4 has the training in sight.
"""

from faceprior.guidance.loading import load_tuned
from faceprior.guidance.objectives import OBJECTIVES
from faceprior.guidance.tuned import TRAIN, TunedPipeline
from faceprior.guidance.tuner import GuidanceTuner

__all__ = ["OBJECTIVES", "TRAIN", "GuidanceTuner", "TunedPipeline", "load_tuned"]
