"""Names of the files in folders of Hugging Face models, as far as saving may replace them."""

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "spiece.model",
    "*.bpe.model",
)
CONFIGS = ("config.json", "generation_config.json")
