"""What diffusers' pipelines have and ours have not: arguments, methods and attributes, each with what there is in its place."""

from collections.abc import Iterable

from chipmunk_jax.errors import InputError, nearest

_EMBEDDINGS = "prompts are read by a call; embeddings of your own are prompt_embeds= and the like"
_IMAGE = "image to image and image to video are not here yet"
_INPAINTING = "inpainting is not here"
_CONTROL = "ControlNets are not here"
_ADAPTER = "IP-Adapters are not here"
_LORA = "LoRA is not here yet"
_HOOKS = "attention processors are not here"
_AUTOMATIC = 'offload="auto" of from_pretrained moves components where room is short, by itself'
_WHOLE_COMPONENTS = "a component is computed whole: no part of one leaves the device"
_DECODER = "the VAE decodes a few frames at a time where room is short, by itself"
_COMPILED = "everything is compiled, and attention is chosen by the device, by itself"
_DEVICE = "a pipeline runs on the default device of JAX; JAX_PLATFORMS=cpu in the environment chooses another kind"
_LATENTS = "latents cannot be changed between steps"
_NETWORK = "the network is read from the folder; its weights are .model, its shapes .network"
_PARTS = "components are read from the folder, and none can be put in another's place"

# Name -> one sentence. First attributes, to read or to put in another's place, which would take a value and do nothing with it.
COMPONENTS = {
    "feature_extractor": _PARTS,
    "image_encoder": _PARTS,
    "scheduler": 'expected solver="euler" or "unipc" of a call; the shift is that of the folder, and sigmas= gives other times',
    "text_encoder": _PARTS,
    "text_encoder_2": _PARTS,
    "tokenizer": _PARTS,
    "tokenizer_2": _PARTS,
    "transformer": _NETWORK,
    "transformer_2": _NETWORK,
    "unet": _NETWORK,
    "vae": f'{_PARTS}; output_type="latent" gives latents to decode elsewhere',
}
ELSEWHERE = COMPONENTS | {
    # Of a call.
    "attention_kwargs": _HOOKS,
    "callback": "callback_on_step_end= is called after every step",
    "callback_on_step_end_tensor_inputs": f"callback_on_step_end is called as (step, t, latents, clean); {_LATENTS}",
    "callback_steps": "callback_on_step_end= is called after every step",
    "clip_skip": "the last layer of CLIP is read, as FLUX was trained",
    "control_image": _CONTROL,
    "controlnet_conditioning_scale": _CONTROL,
    "cross_attention_kwargs": _HOOKS,
    "eta": "the solvers add no noise",
    "generator": "expected seed=, or latents= for noise of your own",
    "ip_adapter_image": _ADAPTER,
    "ip_adapter_image_embeds": _ADAPTER,
    "joint_attention_kwargs": _HOOKS,
    "last_image": _IMAGE,
    "mask_image": _INPAINTING,
    "negative_ip_adapter_image": _ADAPTER,
    "negative_ip_adapter_image_embeds": _ADAPTER,
    "padding_mask_crop": _INPAINTING,
    "return_dict": "the result has .images or .frames, always; leave it out",
    "strength": _IMAGE,
    "video": "video to video is not here",
    # Of from_pretrained().
    "cache_dir": "HF_HOME in the environment is where Hugging Face's cache lies",
    "device_map": _AUTOMATIC,
    "local_files_only": "HF_HUB_OFFLINE=1 in the environment keeps downloads out",
    "low_cpu_mem_usage": "weights go to the device tensor by tensor, by themselves",
    "quantization_config": "quantised weights are not here; float8 files are read and cast",
    "revision": "expected it in the name, hf:owner/name@revision",
    "subfolder": "expected the folder itself, or that of the whole pipeline",
    "token": "expected `hf auth login`, or HF_TOKEN in the environment",
    "torch_dtype": 'expected dtype=, "bfloat16" or "float32"',
    "use_safetensors": "what a file is, its first bytes say",
    "variant": "of several precisions in a folder the full one is read, else the one there is",
    # Methods.
    "cuda": _DEVICE,
    "decode_latents": 'a call decodes; output_type="latent" leaves it out',
    "disable_vae_slicing": _DECODER,
    "disable_vae_tiling": _DECODER,
    "enable_attention_slicing": _COMPILED,
    "enable_model_cpu_offload": f"leave it out: {_AUTOMATIC}",
    "enable_sequential_cpu_offload": f'{_WHOLE_COMPONENTS}; offload="model" keeps one component there at a time',
    "enable_vae_slicing": f"leave it out: {_DECODER}",
    "enable_vae_tiling": f"leave it out: {_DECODER}",
    "enable_xformers_memory_efficient_attention": _COMPILED,
    "encode_prompt": _EMBEDDINGS,
    "fuse_lora": _LORA,
    "load_ip_adapter": _ADAPTER,
    "load_lora_weights": _LORA,
    "load_textual_inversion": "textual inversion is not here",
    "maybe_free_model_hooks": _AUTOMATIC,
    "prepare_latents": "latents= of a call takes noise of your own",
    "remove_all_hooks": _AUTOMATIC,
    "save_pretrained": "`chipmunk convert FOLDER TARGET` writes a folder that loads faster",
    "set_adapters": _LORA,
    "set_ip_adapter_scale": _ADAPTER,
    "set_progress_bar_config": "progress=False of a call draws no bar",
    "to": f'{_DEVICE}, and dtype="float32" of from_pretrained another dtype',
    "unload_lora_weights": _LORA,
}  # fmt: skip


class NotHereError(InputError, AttributeError):
    """An attribute of diffusers' pipelines that ours have not: hasattr() is False."""


def check_known(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises InputError where an argument is not among the known ones of a function; it says what there is in its place."""
    known = list(known)
    for name in given:
        if name not in known:
            said = ELSEWHERE.get(name) or f"no such argument; {nearest(name, known) or f'help({where}) lists all'}"
            raise InputError(f"{name}: {said}")
