package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
)

func logsCommand() *cobra.Command {
	var follow bool
	var tail int
	var file string
	cmd := &cobra.Command{
		Use:               "logs NAME",
		Short:             "Show a microVM's boot log",
		Long:              "Show a microVM's boot log, which is what it wrote to its serial console. " + naming,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			ctx := cmd.Context()
			vm, err := c.find(ctx, args[0])
			if err != nil {
				return err
			}
			request := &ingotv1.LogsRequest{Uid: vm.uid(), Follow: follow, File: file}
			if err := showLogs(ctx, vm, request, tail, cmd.OutOrStdout()); err != nil {
				return fmt.Errorf("read the logs of %s on %s: %w", vm, vm.host.Name, err)
			}
			return nil
		}),
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on with what is written from now on")
	f.IntVar(&tail, "tail", -1, "only the last lines; -1 is all")
	f.StringVar(&file, "file", "stdout", "stdout (the boot log), stderr, log or metrics")
	return cmd
}

func showLogs(ctx context.Context, vm microVM, request *ingotv1.LogsRequest, tail int, w io.Writer) error {
	if tail >= 0 {
		last, err := lastLines(ctx, vm, request.GetFile(), tail)
		if err != nil {
			return err
		}
		if !request.GetFollow() {
			_, err := w.Write(last)
			return err
		}
		// What is written between the two questions moves the beginning, and no
		// more than that: 1 stands for nothing, since 0 is all.
		request.TailBytes = int64(max(len(last), 1))
	}
	seen := &resumer{w: w}
	for {
		err := copyLogs(ctx, vm, request, seen)
		if !request.GetFollow() || ctx.Err() == nil && status.Code(err) != codes.Unavailable {
			return err
		}
		if ctx.Err() != nil {
			return nil // the person has seen enough
		}
		fmt.Fprintf(os.Stderr, "ingot: the daemon on %s has gone: waiting for it\n", vm.host.Name)
		request.TailBytes = resumeWindow
		seen.resume()
	}
}

// resumer writes a log that comes in pieces, the next of which begins before the
// end of the last.
type resumer struct {
	w        io.Writer
	last     []byte // the end of what was written
	resuming bool
	pending  []byte // of a piece whose end of the last one was not found yet
}

const (
	resumeWindow  = 64 << 10 // how far the next piece begins before the end of the log
	resumeOverlap = 1 << 10  // how much of the last piece is looked for in the next
	fullMessage   = 32 << 10 // a shorter one is the last that was there
)

func (r *resumer) resume() { r.resuming, r.pending = len(r.last) > 0, nil }

func (r *resumer) Write(p []byte) (int, error) {
	out := p
	if r.resuming {
		r.pending = append(r.pending, p...)
		at := bytes.LastIndex(r.pending, r.last)
		if at < 0 && len(p) == fullMessage && len(r.pending) < resumeWindow {
			return len(p), nil
		}
		out = r.pending // all of it, where the log has been emptied since
		if at >= 0 {
			out = r.pending[at+len(r.last):]
		}
		r.resuming = false
	}
	r.last = append(r.last, out...)
	r.last = bytes.Clone(r.last[max(0, len(r.last)-resumeOverlap):])
	if _, err := r.w.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

// lastLines is the last n lines of a file.
func lastLines(ctx context.Context, vm microVM, file string, n int) ([]byte, error) {
	for window := int64(16 << 10); ; window *= 8 {
		var b bytes.Buffer
		if err := copyLogs(ctx, vm, &ingotv1.LogsRequest{Uid: vm.uid(), File: file, TailBytes: window}, &b); err != nil {
			return nil, err
		}
		data := b.Bytes()
		if start := lineStart(data, n); start >= 0 {
			return data[start:], nil
		}
		if int64(len(data)) < window {
			return data, nil // that is all there is
		}
	}
}

// lineStart is where the last n lines of data begin, -1 if it has not so many
// whole ones.
func lineStart(data []byte, n int) int {
	end := len(data)
	if n > 0 && bytes.HasSuffix(data, []byte("\n")) {
		end-- // the last line's own end
	}
	for ; n > 0; n-- {
		if end = bytes.LastIndexByte(data[:end], '\n'); end < 0 {
			return -1
		}
	}
	if end == len(data) {
		return end
	}
	return end + 1
}

// copyLogs writes what the host sends.
func copyLogs(ctx context.Context, vm microVM, request *ingotv1.LogsRequest, w io.Writer) error {
	stream, err := vm.host.Logs(ctx, request, grpc.WaitForReady(request.GetFollow()))
	if err != nil {
		return err
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := w.Write(r.GetData()); err != nil {
			return err
		}
	}
}
