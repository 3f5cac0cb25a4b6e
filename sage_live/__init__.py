"""The live half: asyncio driver, gateway and engine adapters. It is not built yet; see ARCHITECTURE.md."""
