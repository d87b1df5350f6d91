"""`AuthFaceRestorer`: detect, align, sample under a ControlNet, fix colours, paste back (AuthFace, arXiv 2410.09864).

restorer = AuthFaceRestorer.from_pretrained("Ethanliang99/AuthFace").to("cuda")
restorer.restore("old_photo.jpg").image.save("restored.png")

settings     the settings by which a restorer is sampled, and the recipes, which are named sets of them
sampling     the denoising of aligned faces under the ControlNet
photographs  faces out of photographs and back
results      what a restored photograph says of itself
restorer     `AuthFaceRestorer`
"""

from faceprior.restorer.restorer import AuthFaceRestorer
from faceprior.restorer.results import FaceResult, RestoredImage
from faceprior.restorer.settings import NEGATIVE_PROMPT, PROMPT, RestorerSettings

__all__ = [
    "NEGATIVE_PROMPT",
    "PROMPT",
    "AuthFaceRestorer",
    "FaceResult",
    "RestoredImage",
    "RestorerSettings",
]
