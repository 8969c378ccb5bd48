#!/usr/bin/env python3
"""Export the UNet and the VAE's decoder to OpenVINO, and make the UNet int8 with NNCF.

    tools/peers/openvino_models.py MODEL CACHE

MODEL is a diffusers folder of Stable Diffusion 1.5's shapes; CACHE receives unet_fp32, unet_int8
and vae_fp32 (.xml and .bin, 5 GB), for 512x512 and batch 1, unless they are there. The int8
network is calibrated on two random inputs: good for its speed, not for its pictures.
"""
import argparse
import gc
import pathlib

SIDE, TOKENS, CONTEXT = 64, 77, 768


def export(network, inputs, path):
    import openvino
    import torch
    with torch.no_grad():
        model = openvino.convert_model(network, example_input=inputs,
                                       input=[list(x.shape) for x in inputs])
    save(model, path)


def save(model, path):
    """The .bin is written first, under its final name; the .xml last says that all is there."""
    import openvino
    part = path.with_name(path.stem + "_part.xml")
    openvino.save_model(model, part, compress_to_fp16=False)
    part.with_suffix(".bin").rename(path.with_suffix(".bin"))
    part.rename(path)


def export_unet(folder, path):
    import diffusers
    import torch

    class Unet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = diffusers.UNet2DConditionModel.from_pretrained(
                folder, subfolder="unet", torch_dtype=torch.float32).eval()

        def forward(self, sample, timestep, context):
            return self.net(sample, timestep, encoder_hidden_states=context, return_dict=False)[0]

    export(Unet(), (torch.randn(1, 4, SIDE, SIDE), torch.tensor([500]),
                    torch.randn(1, TOKENS, CONTEXT)), path)


def export_vae(folder, path):
    import diffusers
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = diffusers.AutoencoderKL.from_pretrained(
                folder, subfolder="vae", torch_dtype=torch.float32).eval()

        def forward(self, latent):
            return self.net.decode(latent, return_dict=False)[0]

    export(Decoder(), (torch.randn(1, 4, SIDE, SIDE),), path)


def quantize_unet(source, path):
    import nncf
    import numpy
    import openvino
    model = openvino.Core().read_model(source)
    kind = model.input(1).element_type.to_dtype()
    rng = numpy.random.RandomState(0)
    inputs = [[rng.randn(1, 4, SIDE, SIDE).astype("f"), numpy.array([t], kind),
               rng.randn(1, TOKENS, CONTEXT).astype("f")] for t in (500, 100)]
    advanced = nncf.AdvancedQuantizationParameters(
        disable_bias_correction=True,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1))
    save(nncf.quantize(model, nncf.Dataset(inputs), subset_size=2,
                       model_type=nncf.ModelType.TRANSFORMER,
                       preset=nncf.QuantizationPreset.MIXED, advanced_parameters=advanced), path)


def write(folder, cache):
    """Make what is missing in the cache."""
    cache = pathlib.Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    unet, vae, int8 = (cache / f"{name}.xml" for name in ("unet_fp32", "vae_fp32", "unet_int8"))
    for path, make, source in ((unet, export_unet, folder), (vae, export_vae, folder),
                               (int8, quantize_unet, unet)):
        if not path.exists():
            make(source, path)
            gc.collect()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("cache", type=pathlib.Path)
    args = parser.parse_args()
    write(args.model, args.cache)


if __name__ == "__main__":
    main()
