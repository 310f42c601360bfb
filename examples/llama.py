"""A Llama model on the library's pieces, to read from top to bottom and to change.

All is plain PyTorch but two calls in ``Layer.forward``: one rotates queries and keys, and writes keys and
values into the cache; the other attends to what lives there. A CUDA graph holds a step for every length.

    python examples/llama.py                                  tiny and random: seconds on a CPU
    python examples/llama.py FOLDER --prompt "Once upon"      weights and tokenizer as Transformers saves them
    python examples/llama.py codellama-34b --context 65536    random weights, to see how fast it is
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flash_decoding import ContiguousCache, append_kv, decode_attention
from flash_decoding.plan import Hardware

Config = namedtuple(
    "Config", "vocab hidden inner layers heads_q heads_kv head_dim rope eps tied eos", defaults=(1e-5, 0, ())
)
LLAMA_3_1 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3_1 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CONFIGS = {
    "tiny": Config(512, 256, 512, 4, 8, 2, 32, {"rope_theta": 1e4}),
    "codellama-34b": Config(32000, 8192, 22016, 48, 64, 8, 128, {"rope_theta": 1e6}),
    "llama-3.1-8b": Config(128256, 4096, 14336, 32, 32, 8, 128, LLAMA_3_1),
}
# Weights that read the same input are one matrix here: fewer launches, longer reads.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def read_config(folder: Path) -> Config:
    c = json.loads((folder / "config.json").read_text())
    if c["model_type"] != "llama" or c.get("attention_bias") or c.get("mlp_bias"):
        raise SystemExit(f"{folder} holds no Llama without biases, and this file knows nothing else")
    heads, hidden, eos = c["num_attention_heads"], c["hidden_size"], c.get("eos_token_id")
    heads_kv, dim = c.get("num_key_value_heads") or heads, c.get("head_dim") or hidden // heads
    sizes = c["vocab_size"], hidden, c["intermediate_size"], c["num_hidden_layers"], heads, heads_kv, dim
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # older files keep the base beside it
    rope = {"rope_theta": c.get("rope_theta", 1e4), **rope}
    tied, eos = c.get("tie_word_embeddings", False), eos if isinstance(eos, list) else [eos]
    return Config(*sizes, rope, c["rms_norm_eps"], tied, eos)


def rotary_tables(c: Config, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (positions, head_dim // 2) of every position times every frequency."""
    rope, kind = c.rope, c.rope.get("rope_type") or c.rope.get("type", "default")
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    if kind == "llama3":  # slow waves become slower still, fast ones stay, those between are blended
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / rope["factor"] + kept * frequencies
    elif kind != "default":
        raise SystemExit(f"rotary embedding of type {kind!r}: this file knows default and llama3")
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    return angles.cos(), angles.sin()


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.widths = [heads * c.head_dim for heads in (c.heads_q, c.heads_kv, c.heads_kv)]
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(c.hidden, c.eps) for _ in range(2))
        self.qkv_proj = nn.Linear(c.hidden, sum(self.widths), bias=False)
        self.o_proj = nn.Linear(self.widths[0], c.hidden, bias=False)
        self.gate_up_proj = nn.Linear(c.hidden, 2 * c.inner, bias=False)
        self.down_proj = nn.Linear(c.inner, c.hidden, bias=False)

    def forward(self, x: Tensor, index: int, cache: ContiguousCache, cos: Tensor, sin: Tensor) -> Tensor:
        parts = self.qkv_proj(self.input_layernorm(x)).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        q_rotated: Any = append_kv(k, v, **cache.writing(index), q=q, rotary_cos=cos, rotary_sin=sin)
        heads: Any = decode_attention(q_rotated, **cache.reading(index))
        x = x + self.o_proj(heads.flatten(-2))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        x = x + self.down_proj(nn.functional.silu(gate) * up)
        return x


class Llama(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm, self.lm_head = nn.RMSNorm(c.hidden, c.eps), nn.Linear(c.hidden, c.vocab, bias=False)

    def forward(self, tokens: Tensor, cache: ContiguousCache, cos: Tensor, sin: Tensor) -> Tensor:
        """Append tokens (batch, q_len) to the cache; logits (batch, vocab) after the last of them."""
        cache.advance(tokens.shape[1])
        x: Tensor = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, index, cache, cos, sin)
        return nn.functional.linear(self.norm(x[:, -1]), self.lm_head.weight)


def load(source: str, dtype: torch.dtype, device: str) -> Llama:
    """The model in a folder, or one of CONFIGS with random weights."""
    with torch.device("meta"):
        model = Llama(CONFIGS.get(source) or read_config(Path(source))).to(dtype).requires_grad_(False)
    if source in CONFIGS:
        for weight in model.to_empty(device=device).parameters():
            weight.fill_(1) if weight.ndim == 1 else weight.normal_(std=weight.shape[1] ** -0.5)
        return model
    shards = (load_file(shard, device=device) for shard in sorted(Path(source).glob("*.safetensors")))
    brief = re.compile(r"model\.|self_attn\.|mlp\.")
    weights = {brief.sub("", name): x.to(dtype) for shard in shards for name, x in shard.items()}
    for at, whole in product(range(model.config.layers), FUSED):
        matrices = [weights.pop(f"layers.{at}.{part}.weight") for part in FUSED[whole]]
        weights[f"layers.{at}.{whole}.weight"] = torch.cat(matrices)
    if model.config.tied:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)  # refuses what is missing, and what is too much
    return model


class Decoder:
    """One sequence over a cache. ``self.token`` (1, 1) is the newest token, which is not in the cache yet."""

    def __init__(self, model: Llama, capacity: int, temperature: float = 0.0) -> None:
        c, like = model.config, model.norm.weight
        self.model, self.temperature = model, temperature
        self.cache = ContiguousCache(
            1, capacity, c.heads_kv, c.head_dim, layers=c.layers, dtype=like.dtype, device=like.device
        )
        self.rotary = [table.to(like) for table in rotary_tables(c, capacity)]
        self.token = torch.zeros(1, 1, dtype=torch.long, device=like.device)
        self.next: Callable[[], None] = lambda: self.step(self.token)
        if like.is_cuda:
            self.next()  # compiles; no sequence has started, so nothing counts
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.next()
            self.next = graph.replay

    def step(self, tokens: Tensor) -> None:
        """Append ``tokens`` (1, q_len) and choose the one behind them, all on the device."""
        logits = self.model(tokens, self.cache, *self.rotary)
        if self.temperature > 0:  # the largest of p / noise is a draw from p
            p = torch.softmax(logits.float() / self.temperature, dim=-1)
            logits = p / torch.empty_like(p).exponential_()
        self.token.copy_(logits.argmax(dim=-1, keepdim=True))

    def generate(self, prompt: Tensor, new: int, chunk: int = 2048) -> Iterator[int]:
        """Up to ``new`` tokens behind ``prompt`` (1, tokens), which goes through the model in chunks."""
        for part in torch.split(prompt, chunk, dim=1):
            self.cache.allocate(part.shape[1])
            self.step(part)
        for left in reversed(range(new)):
            yield (token := int(self.token))
            if token in self.model.config.eos or left == 0:
                return
            self.cache.allocate(1)
            self.next()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny", help=f"a folder, or one of {', '.join(CONFIGS)}")
    parser.add_argument("--prompt", help="text; random tokens if left out")
    parser.add_argument("--context", type=int, default=100, help="how many random tokens")
    parser.add_argument("--new", type=int, default=50, help="tokens to write at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    args, device = parser.parse_args(), "cuda" if torch.cuda.is_available() else "cpu"
    model = load(args.model, torch.bfloat16 if device == "cuda" else torch.float32, device)
    prompt = torch.randint(model.config.vocab, (1, args.context), device=device)
    if args.prompt is not None:
        from transformers import AutoTokenizer, TextStreamer

        streamer: Any = TextStreamer(AutoTokenizer.from_pretrained(args.model))
        prompt = streamer.tokenizer(args.prompt, return_tensors="pt").input_ids.to(device)
    decoder, times = Decoder(model, prompt.shape[1] + args.new, args.temperature), []
    for token in decoder.generate(prompt, args.new):
        times.append(time.perf_counter())
        streamer.put(torch.tensor([token])) if args.prompt is not None else print(token, end=" ")
    streamer.end() if args.prompt is not None else print()
    keys, rate = decoder.cache.keys[:, :, 0], (len(times) - 1) / max(times[-1] - times[0], 1e-9)
    read = 2 * keys.nbytes * decoder.cache.lengths[0] + sum(weight.nbytes for weight in model.parameters())
    bound = Hardware.of(keys.device).bandwidth / read  # 0 where nobody knows it: a CPU
    print(f"{rate:.1f} tokens/s" + (f", {rate / bound:.0%} of what the memory allows" if bound else ""))


if __name__ == "__main__":
    main()
