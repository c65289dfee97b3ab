"""Serving: the OpenAI Images API over the admission loop, a page to look at, and replicas on several machines."""
