"""vLLM as the engine that samples: options, the weights it is sent, and TRL's `VLLMGeneration` with these."""
