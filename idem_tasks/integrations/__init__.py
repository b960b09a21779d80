"""One module per thing adapted; each is loaded only when its library is."""
