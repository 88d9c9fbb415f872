"""The bound of a trained model as a chain of T steps, and in continuous time.

    python benchmarks/chains.py CHECKPOINT --path DATA

Each row is the full bound on held-out data, with the model's own schedule and its decoder (bytes
if it has none), and with noise levels stratified over all examples and samples.
"""

from __future__ import annotations

import argparse
import json
import math

import torch

from lit_diffusion import BoundTerms, SoftmaxDecoder, variational_bound
from lit_diffusion.times import fixed_times
from lit_diffusion.training import DataModule, LitDiffusion
from lit_diffusion.training.step.randomness import generators


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--path", default="digits8x8", help="Data of the checkpoint.")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--batch", type=int, default=100)
    args = parser.parse_args()
    model = LitDiffusion.load_from_checkpoint(args.checkpoint)
    data = DataModule(
        args.path,
        shape=model.shape,
        batch_size=args.batch,
        val_examples=args.examples,
    )
    data.setup("validate")
    decoder = model.loss.decoder or SoftmaxDecoder()
    result: dict[str, object] = {"λ": model.loss.schedule.ends, "decoder": repr(decoder)}
    for num_timesteps in (10, 100, 1000, None):
        found = []
        for sample in range(args.samples):
            for batch in data.val_dataloader():
                batch = data.on_after_batch_transfer(batch, 0)
                index, total = batch["index"], int(batch["total"])
                t = fixed_times(index, total, sample, args.samples)
                noise = generators(sample, "chain", index.tolist())
                terms = variational_bound(
                    model.denoiser,
                    batch["image"],
                    model.loss.schedule,
                    decoder,
                    num_timesteps,
                    noise,
                    t,
                    **model.condition(batch),
                )
                found.append(torch.stack(terms) / math.log(2))
        every = torch.cat(found, 1)
        terms = BoundTerms(*every.mean(1))
        result["continuous" if num_timesteps is None else f"T = {num_timesteps}"] = {
            "bits per dimension": float(terms.total),
            "± (as if not stratified)": float(every.sum(0).std() / every.shape[1] ** 0.5),
            **{name: float(value) for name, value in terms._asdict().items()},
        }
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
