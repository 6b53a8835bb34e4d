"""The model of the demo: an unmodified Llama from transformers, as large as one likes."""

from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(size: dict[str, int], vocabulary: int) -> LlamaForCausalLM:
    """Return a Llama with tied embeddings and one head of keys for two of queries.

    Args:
        size: width, layers, heads, and length in tokens.
        vocabulary: Tokens it knows.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size["width"],
            intermediate_size=size["width"] * 8 // 3 // 32 * 32,
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["heads"] // 2,
            max_position_embeddings=size["length"],
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
