"""Logits of exported folders where Sparsight cannot be imported: python without_sparsight.py TASKS OUT

TASKS is JSON, a list of [folder, whether its code is trusted, adapters' folder or ""]. Beside each folder lie
`inputs.pt` and `image.png`. OUT gets, for each, the class that loaded it, its logits, and whether its processor made
those inputs; or why it does not load.
"""

import json
import sys


class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "sparsight":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402


def logits(folder, trusted, adapters):
    trust = {"trust_remote_code": True} if trusted else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    inputs = torch.load(folder + "/../inputs.pt")
    image = Image.open(folder + "/../image.png")
    own = processor(images=[image], text=inputs.pop("text"), return_tensors="pt", add_special_tokens=False)
    same = own["input_ids"].equal(inputs["input_ids"]) and own["pixel_values"].equal(inputs["pixel_values"])
    kind = type(model).__name__
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapters)
    with torch.no_grad():
        found = kind, model.eval()(**inputs).logits, same
    if trusted and not adapters:  # what was loaded so is saved so
        model.save_pretrained(folder + "/../again")
        processor.save_pretrained(folder + "/../again")
        AutoModelForImageTextToText.from_pretrained(folder + "/../again", **trust)
    return found


if __name__ == "__main__":
    found = []
    for task in json.loads(sys.argv[1]):
        try:
            found.append(logits(*task))
        except Exception as error:  # other folders load nevertheless
            found.append(f"{type(error).__name__}: {error}")
    assert "sparsight" not in sys.modules
    torch.save(found, sys.argv[2])
