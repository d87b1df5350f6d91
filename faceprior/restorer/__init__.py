"""`AuthFaceRestorer`: detect, align, sample under a ControlNet, fix colours, paste back (AuthFace, arXiv 2410.09864).

restorer = AuthFaceRestorer.from_pretrained("Ethanliang99/AuthFace").to("cuda")
restorer.restore("old_photo.jpg").image.save("restored.png")

settings     the settings by which a restorer is sampled, and the recipes, which are named sets of them
sampling     the denoising of aligned faces under the ControlNet
aligned      an image that is one face as a whole, by the official way among others
rehearsal    the memory that restoring takes, planned
photographs  faces out of photographs and back
results      what a restored photograph says of itself
restorer     `AuthFaceRestorer`
"""

from faceprior.restorer.rehearsal import print_restoring_plan
from faceprior.restorer.restorer import AuthFaceRestorer
from faceprior.restorer.results import FaceResult, RestoredImage
from faceprior.restorer.settings import NEGATIVE_PROMPT, PROMPT, RECIPES, RestorerSettings

__all__ = [
    "NEGATIVE_PROMPT",
    "PROMPT",
    "RECIPES",
    "AuthFaceRestorer",
    "FaceResult",
    "RestoredImage",
    "RestorerSettings",
    "print_restoring_plan",
]
