"""The three classes in a few lines each, on the small embedded models: no GPU, no network.

    python examples/sdk.py

Give the ids in the comments instead of `tiny.resolve(...)` to use the real models.
"""

from PIL import Image, ImageFilter

from faceprior import AuthFaceRestorer, FaceScorer, GuidanceTuner, tiny
from faceprior.detect import box_mask
from faceprior.images import to_pixel_values
from faceprior.procedural import draw_portrait

drawings = [draw_portrait(seed, size=128) for seed in range(4)]
portraits = [Image.fromarray(drawing.image) for drawing in drawings]

scorer = FaceScorer.from_pretrained(tiny.resolve("tiny", "scorer"))  # "OPPOer/FaceScore"
for faces in scorer.score(portraits, min_face_size=16):
    print("Face Score:", [round(face.score, 4) for face in faces])

pairs = [
    {
        "good": to_pixel_values(image)[0],
        "bad": to_pixel_values(image.filter(ImageFilter.GaussianBlur(2)))[0],
        "mask": (to_pixel_values(box_mask(image.size, drawing.box))[0, :1] > 0).float(),
        "prompt": drawing.caption(),
    }
    for image, drawing in zip(portraits, drawings, strict=True)
]
tuner = GuidanceTuner.from_pretrained(tiny.resolve("tiny", "sd15"), train="lora", rank=4)  # "my_model.safetensors"
tuner.fit(pairs, steps=4, learning_rate=1e-3).save_pretrained("results/example_lora")

restorer = AuthFaceRestorer.from_pretrained(tiny.resolve("tiny", "restorer"))  # "Ethanliang99/AuthFace"
restored = restorer.restore(portraits[0], min_face_size=16, num_inference_steps=10)
restored.image.save("results/example_restored.png")
print("restored faces:", len(restored.faces))
