"""Other people's servers, each in a virtual environment of its own, measured beside ours by `warmgate bench`."""
