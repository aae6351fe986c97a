"""The head in trainers and model libraries; each module needs its library, and none is imported here."""
