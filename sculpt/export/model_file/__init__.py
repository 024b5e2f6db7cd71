"""Model files: a network as JSON and safetensors, which runs without the code that built it."""
