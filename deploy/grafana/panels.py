"""Panels of a dashboard: a few expressions each, in Prometheus' language, and how Grafana draws them."""

from collections.abc import Mapping
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WINDOW = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """A title, what each line shows by its legend, the unit in Grafana's own names, and what to look for."""

    title: str
    lines: Mapping[str, str]
    unit: str
    description: str
    single: bool = False
    """The last value as a figure, and not a curve."""


def total(metric: str, where: str, by: str = "") -> str:
    """Of a gauge, over replicas."""
    return f"sum{f' by ({by})' if by else ''} ({metric}{{{where}}})"


def rate(metric: str, where: str, by: str = "") -> str:
    """Of a counter, a second, over replicas."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{where}}}{WINDOW}))"


def or_zero(expression: str, label: str = "", value: str = "") -> str:
    """The expression, and 0 where there is nothing: what never happened, or has no rows on such a server."""
    zero = f'label_replace(vector(0), "{label}", "{value}", "", "")' if label else "vector(0)"
    return f"{expression} or on () {zero}"


def share(part: str, whole: str) -> str:
    """A rate by another; 0 while nothing happens."""
    return or_zero(f"{part} / ({whole} > 0)")


def quantile(part: float, metric: str, where: str) -> str:
    """Of a histogram, over replicas."""
    return f"histogram_quantile({part}, {rate(f'{metric}_bucket', where, 'le')})"


def mean(metric: str, where: str) -> str:
    """Of a histogram, over replicas."""
    return f"{rate(f'{metric}_sum', where)} / {rate(f'{metric}_count', where)}"


def latency(title: str, metric: str, where: str, description: str) -> Panel:
    """Quantiles and the mean of a histogram of seconds."""
    lines = {f"p{part * 100:g}": quantile(part, metric, where) for part in (0.5, 0.9, 0.99)}
    return Panel(title, lines | {"mean": mean(metric, where)}, "s", description)


def built(panel: Panel) -> timeseries.Panel | stat.Panel:
    """The panel in Grafana's terms."""
    each: timeseries.Panel | stat.Panel
    if panel.single:
        each = stat.Panel().height(4).span(4)
    else:
        legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        each = timeseries.Panel().height(7).span(12).legend(legend.show_legend(True)).min(0)
    for number, (legend_format, expression) in enumerate(panel.lines.items()):
        query = prometheus.Dataquery().expr(expression).legend_format(legend_format).ref_id(chr(ord("A") + number))
        each.with_target(query.range())
    return each.title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
