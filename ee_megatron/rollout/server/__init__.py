"""An HTTP server that speaks OpenAI's completions protocol over one engine thread with continuous batching."""
