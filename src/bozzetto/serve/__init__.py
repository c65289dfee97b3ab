"""Serving: the OpenAI Images API over a scheduler, a page to look at, and replicas on several machines."""
