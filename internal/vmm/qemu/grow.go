package qemu

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// Grow has the guest see that a disk has grown. block_resize sets the file's size,
// too: it would cut off what is beyond a smaller one.
func (m *machine) Grow(ctx context.Context, disk int, size int64) error {
	node := nodeName(disk)
	err := m.ask(ctx, func(q *monitor) error {
		has, err := diskSize(ctx, q, node)
		switch {
		case err != nil || size == has:
			return err
		case size < has:
			return fmt.Errorf("it has %d bytes already: %w", has, errdefs.ErrInvalidArgument)
		}
		return q.call(ctx, "block_resize", map[string]any{"node-name": node, "size": size}, nil)
	})
	if err != nil {
		return fmt.Errorf("grow %s to %d bytes: %w", node, size, err)
	}
	return nil
}

// diskSize is how large the guest sees a disk.
func diskSize(ctx context.Context, q *monitor, node string) (int64, error) {
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size int64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := q.call(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return 0, err
	}
	for _, n := range nodes {
		if n.Name == node {
			return n.Image.Size, nil
		}
	}
	return 0, fmt.Errorf("there is no such disk: %w", errdefs.ErrInvalidArgument)
}
