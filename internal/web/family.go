package web

import (
	"cmp"
	"errors"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// measure is a metric that is measured when somebody asks.
type measure struct {
	name, help string
	kind       dto.MetricType
}

func gauge(name, help string) *measure { return &measure{name, help, dto.MetricType_GAUGE} }
func total(name, help string) *measure { return &measure{name, help, dto.MetricType_COUNTER} }

// families are measures with their values. They are made here and not by the client's
// library, which takes some four times as long for those of a thousand microVMs, and
// as much more memory: it makes and checks the labels anew for each value.
type families map[*measure]*dto.MetricFamily

func (f families) add(m *measure, value float64, labels ...*dto.LabelPair) {
	family := f[m]
	if family == nil {
		family = &dto.MetricFamily{Name: &m.name, Help: &m.help, Type: &m.kind}
		f[m] = family
	}
	one := &dto.Metric{Label: labels}
	if m.kind == dto.MetricType_COUNTER {
		one.Counter = &dto.Counter{Value: &value}
	} else {
		one.Gauge = &dto.Gauge{Value: &value}
	}
	family.Metric = append(family.Metric, one)
}

// histogram adds one, of how many there are in each bucket, whose upper ends in seconds
// are bounds and then none; took is their sum.
func (f families) histogram(m *measure, bounds []float64, buckets []uint64, took float64) {
	h := &dto.Histogram{SampleSum: &took}
	var total uint64
	for i, n := range buckets {
		total += n
		if i < len(bounds) {
			h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: &bounds[i], CumulativeCount: new(total)})
		}
	}
	h.SampleCount = &total
	f[m] = &dto.MetricFamily{Name: &m.name, Help: &m.help, Type: &m.kind, Metric: []*dto.Metric{{Histogram: h}}}
}

// count adds the number of each kind, also of those of which there are none.
func count[T ~string](f families, m *measure, name string, kinds []T, numbers map[T]int) {
	for _, kind := range kinds {
		f.add(m, float64(numbers[kind]), label(name, string(kind)))
	}
}

func label(name, value string) *dto.LabelPair { return &dto.LabelPair{Name: &name, Value: &value} }

// with is what was counted together with what is measured, in the order of their names.
func with(counted prometheus.Gatherer, measured func() (families, error)) prometheus.GathererFunc {
	return func() ([]*dto.MetricFamily, error) {
		all, err := counted.Gather()
		more, problem := measured()
		for _, f := range more {
			all = append(all, f)
		}
		slices.SortFunc(all, func(a, b *dto.MetricFamily) int { return cmp.Compare(a.GetName(), b.GetName()) })
		return all, errors.Join(err, problem)
	}
}
