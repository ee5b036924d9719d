"""The full-size model as llama.cpp reads it: a GGUF of the same shape in Q4_0 (output Q6_K), with random values."""

from pathlib import Path

import numpy as np

from bench.full_size import CONFIG


def make(path: Path, seed: int = 0) -> Path:
    """Write `path`, unless it is there already, and return it. 3.9 GB."""
    if path.exists():
        return path
    from gguf import GGMLQuantizationType, GGUFWriter

    random = np.random.default_rng(seed)
    hidden, inter, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    kv = hidden * CONFIG["num_key_value_heads"] // CONFIG["num_attention_heads"]
    scale = np.frombuffer(np.float16(0.003).tobytes(), dtype=np.uint8)

    def q4_0(rows: int, columns: int) -> np.ndarray:  # blocks of 32: fp16 scale, 16 bytes of nibbles
        blocks = random.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        blocks[..., :2] = scale
        return blocks.reshape(rows, -1)

    def q6_k(rows: int, columns: int) -> np.ndarray:  # blocks of 256: 192 bytes of weights, 16 of scales, fp16 scale
        blocks = random.integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)
        blocks[..., 208:] = np.frombuffer(np.float16(1e-5).tobytes(), dtype=np.uint8)
        return blocks.reshape(rows, -1)

    unfinished = path.with_suffix(".unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(unfinished, "llama")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(inter)
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    pieces = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256]  # unknown, control, control, bytes
    writer.add_token_list(pieces + [f"word{i}".encode() for i in range(vocab - len(pieces))])
    writer.add_token_types(kinds + [1] * (vocab - len(kinds)))
    writer.add_token_scores([0.0] * vocab)

    # One array per shape, written for every layer: speed does not depend on the values.
    small, square, up, down = q4_0(kv, hidden), q4_0(hidden, hidden), q4_0(inter, hidden), q4_0(hidden, inter)
    norm = np.ones(hidden, dtype=np.float32)
    matrices = {
        "attn_q": square, "attn_k": small, "attn_v": small, "attn_output": square, "ffn_gate": up, "ffn_up": up,
        "ffn_down": down,
    }  # fmt: skip
    writer.add_tensor("token_embd.weight", q4_0(vocab, hidden), raw_dtype=GGMLQuantizationType.Q4_0)
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, matrix in matrices.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix, raw_dtype=GGMLQuantizationType.Q4_0)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", norm)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    writer.add_tensor("output.weight", q6_k(vocab, hidden), raw_dtype=GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)
    return path
