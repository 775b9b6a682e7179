package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	ingotv1 "ingot/api/ingot/v1"
)

func leaseWatchCommand() *cobra.Command {
	var out *output
	cmd := &cobra.Command{
		Use:   "watch",
		Short: "Show leases as they change, a line for each, until it is interrupted",
		Args:  cobra.NoArgs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, _ []string) error {
			ctx, w := cmd.Context(), cmd.OutOrStdout()
			return c.watchLeases(ctx, func(v leaseView) error { return showChange(w, *out, v) })
		}),
	}
	out = outputFlag(cmd)
	return cmd
}

// showChange is a line whose columns stand under those of the lines before: nobody
// knows how wide what comes will be.
func showChange(w io.Writer, out output, v leaseView) error {
	switch out {
	case asJSON:
		return json.NewEncoder(w).Encode(v)
	case asYAML:
		fmt.Fprintln(w, "---")
		return out.write(w, v, nil)
	}
	row := v.row()
	for i, cell := range row {
		if cell == "" {
			row[i] = "-"
		}
	}
	_, err := fmt.Fprintf(w, "%s  %-15s  %-17s  %-9s  %-19s  %s  %s\n", time.Now().UTC().Format(time.TimeOnly), row[0], row[1], row[3], row[4], row[2], row[6])
	return err
}

// watchLeases shows each change, also over restarts of the hub.
func (c *cloud) watchLeases(ctx context.Context, show func(leaseView) error) error {
	known := map[string]*ingotv1.Lease{}
	for first := true; ; first = false {
		watch, err := c.hub.WatchLeases(ctx, &ingotv1.WatchLeasesRequest{}, grpc.WaitForReady(!first))
		for err == nil {
			var e *ingotv1.LeaseEvent
			if e, err = watch.Recv(); err != nil {
				break
			}
			l := e.GetLease()
			was := known[l.GetIp()]
			known[l.GetIp()] = l
			if first && e.GetInitial() || proto.Equal(was, l) {
				continue
			}
			if err := show(viewLease(l)); err != nil {
				return err
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case status.Code(err) != codes.Unavailable || first && len(known) == 0:
			return fmt.Errorf("watch leases: %w", err)
		}
	}
}
