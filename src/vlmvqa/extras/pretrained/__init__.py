"""Pretrained vision-language models of transformers, behind the methods of `VLM`."""
