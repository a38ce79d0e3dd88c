from efficient_densenet.cli import main

raise SystemExit(main())
