"""A trained model in the form that llama.cpp, Ollama and LM Studio read: one GGUF file.

`run.export` writes it and lays it beside the model it is of, in llama.cpp itself.
"""

__all__ = ["run"]
