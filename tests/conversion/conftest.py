import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 97
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1,
    eos_token_id=2, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
CONFIGS = {
    "llama": lambda **kw: LlamaConfig(**SIZES | kw),
    "mistral": lambda **kw: MistralConfig(**SIZES | dict(head_dim=8, sliding_window=None) | kw),
    "qwen2": lambda **kw: Qwen2Config(**SIZES | kw),
    "qwen3": lambda **kw: Qwen3Config(**SIZES | dict(head_dim=16) | kw),
}


def tiny(kind="llama", seed=0, **kwargs):
    """A random model of a real transformers class; q/k norms and biases are made to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def shake(model, seed=1):
    """Gives the conversion's own parameters values that no test passes by accident with."""
    from fastweights.conversion import linearized_layers

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in linearized_layers(model):
            for parameter in layer.own_parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def random_tokens(*shape, seed=2):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made
