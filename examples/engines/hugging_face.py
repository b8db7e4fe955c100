"""Hugging Face: `python examples/engines/hugging_face.py MODEL FOLDER RESULTS.parquet`."""

import sys

import datasets

import cropr_kernels as cropr

model, folder, out = sys.argv[1:]
predictor = cropr.Predictor(model, threads=1)
photos = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
photos = photos.cast_column("image", datasets.Image(decode=False))  # the predictor decodes


def predict(batch):
    paths = [image["path"] for image in batch["image"]]
    return predictor(paths, names=paths)


results = photos.map(predict, batched=True, batch_size=256, num_proc=2, remove_columns=["image"])
results.to_parquet(out)
