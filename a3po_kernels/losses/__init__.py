"""The calls a user makes, and what joins the stages."""
