"""The live half: the asyncio driver and emulated engines. Gateway and adapters for real engines are not built yet."""
