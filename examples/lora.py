"""LoRA (Hu et al., arXiv:2106.09685) on a base that is 2:4: the base stays as it is, the adapters are dense.

pip install openwork transformers peft
python lora.py
"""

import openwork.integrations  # isort: skip  (before transformers: it repairs a broken torchvision)
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import openwork as ow

torch.manual_seed(0)
sizes = GPT2Config(vocab_size=40, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
base = GPT2LMHeadModel(sizes)  # or .from_pretrained("your/model")


def text(shift, count=64):
    """Sequences that count up by `shift`."""
    return (torch.randint(1, 40, (count, 1)) + shift * torch.arange(24)) % 40


def train(model, shift, steps, lr):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    if model is base:
        ow.attach(optimizer, model)
    for _ in range(steps):
        loss = model(input_ids=(words := text(shift)), labels=words).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


print(ow.sparsify(base, "2:4", ow.SRSTE(decay=2, decoupled=True), exclude=["lm_head", "*wte*", "*wpe*"]).summary)
print(f"base, counting by 1: loss {train(base, 1, 40, 4e-3):.2f}")
ow.finalize(base)  # adapters go on a finalized model
ow.save(base, "base.safetensors", pattern=ow.Selection("2:4", exclude=["lm_head", "*wte*", "*wpe*"]))

model = get_peft_model(base, LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))
model.print_trainable_parameters()
print(f"adapters, counting by 3: loss {train(model, 3, 60, 2e-2):.2f}")
model.save_pretrained("adapters")  # some kB, beside base.safetensors

held = ow.verify(model, {"input_ids": text(3, 1)}, pattern={"*base_layer*": "2:4"})
print(str(held.products).splitlines()[0])  # every product of the base is still 2:4
