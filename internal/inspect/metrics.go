package inspect

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	// metricsTime is how long metrics may take to come.
	metricsTime = 5 * time.Second
	// mostMetrics is more than a daemon tells.
	mostMetrics = 64 << 20
)

func metricsStep(address string) step {
	return step{name: "metrics", check: func(ctx context.Context) finding { return checkMetrics(ctx, address) }}
}

// checkMetrics asks for metrics as Prometheus does.
func checkMetrics(ctx context.Context, address string) finding {
	ctx, cancel := context.WithTimeout(ctx, metricsTime)
	defer cancel()
	url := "http://" + address + "/metrics"
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return fail(err.Error())
	}
	// No proxy knows the segment, and no connection is worth keeping.
	r, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(q)
	if err != nil {
		return fail(err.Error())
	}
	defer r.Body.Close()
	b, err := io.ReadAll(io.LimitReader(r.Body, mostMetrics))
	switch {
	case err != nil:
		return fail(fmt.Sprintf("%s: %v", url, err))
	case r.StatusCode != http.StatusOK:
		return fail(fmt.Sprintf("%s answers %s: %s", url, r.Status, strings.TrimSpace(string(b[:min(len(b), 200)]))))
	case !strings.Contains(string(b), "\ningot_build_info{"):
		return fail(url + " does not tell of Ingot")
	}
	return pass(url)
}
