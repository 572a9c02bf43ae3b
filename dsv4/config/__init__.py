"""The model's configuration: official key names, frozen and strict.

`ModelConfig.from_path(folder)` reads a `config.json` as DeepSeek publishes it (V4-Flash, V4-Pro, Flash-0731, Pro-0813)
or as transformers' `save_pretrained` writes it, and either returns a checked configuration or raises one `ConfigError`
that lists every finding. `ModelConfig.from_name("random:tiny")` gives a configuration that needs no file.

Dimension letters, used in every docstring of the project (official key in brackets):

| letter | meaning                                     | letter | meaning                                        |
|--------|---------------------------------------------|--------|------------------------------------------------|
| T      | tokens (rows) of a step                     | E      | routed experts [n_routed_experts]              |
| B      | requests (sequences) of a step              | K      | experts per token [num_experts_per_tok]        |
| D      | hidden width [hidden_size]                  | F      | expert width [moe_intermediate_size]           |
| V      | vocabulary [vocab_size]                     | G      | output groups [o_groups]                       |
| H      | query heads [num_attention_heads]           | O      | output rank of one group [o_lora_rank]         |
| Dh     | head width [head_dim]                       | Q      | query rank [q_lora_rank]                       |
| R      | rotary dims, the LAST R [qk_rope_head_dim]  | Hi     | indexer heads [index_n_heads]                  |
| M      | residual streams [hc_mult]                  | Di     | indexer head width [index_head_dim]            |
| W      | window [sliding_window]                     | m      | compress ratio of a layer (tokens per entry)   |
| S      | sequence slots of the cache                 | P, p   | DSpark: target layers, Markov rank             |

In a matrix product, N is the number of outputs (rows of a weight) and K the number of inputs; the text says which K.
"""

from dsv4.config.spec import (
    DSparkConfig,
    LayerKind,
    LayerSpec,
    ModelConfig,
    QuantizationConfig,
    YarnScaling,
)

__all__ = ["DSparkConfig", "LayerKind", "LayerSpec", "ModelConfig", "QuantizationConfig", "YarnScaling"]
