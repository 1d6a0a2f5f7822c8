"""HTTP: the routes of the OpenAI API, of the admin, and the page."""
