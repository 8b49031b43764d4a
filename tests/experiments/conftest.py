import gin
import pytest


@pytest.fixture(autouse=True)
def fresh_gin():
    """Gin's bindings are global: no test sees another's."""
    gin.clear_config()
    yield
    gin.clear_config()
