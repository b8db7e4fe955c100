"""A page that shows pruning: comparisons of photos, pictures of tokens, and the page itself."""
