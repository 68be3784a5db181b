"""`python -m gptjax VERB` is `gptjax VERB`."""

from gptjax.cli import main

raise SystemExit(main())
