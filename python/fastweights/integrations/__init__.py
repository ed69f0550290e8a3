"""Other people's libraries, one file or package each, imported when it is used."""
