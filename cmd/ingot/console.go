package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
)

// detachKey is Ctrl-], as telnet and virsh have it.
const detachKey = 0x1d

func consoleCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "console NAME",
		Short:             "Attach to a microVM's serial console; Ctrl-] detaches",
		Long:              "Attach to a microVM's serial console. Ctrl-] detaches and leaves it running. " + naming,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			vm, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := console(cmd.Context(), vm); err != nil {
				return fmt.Errorf("attach to the console of %s on %s: %w", vm, vm.host.Name, err)
			}
			return nil
		}),
	}
}

func console(ctx context.Context, vm microVM) error {
	// The default action of a signal would leave the terminal raw.
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP, syscall.SIGQUIT)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t, err := rawTerminal()
	if err != nil {
		return fmt.Errorf("set up the terminal: %w", err)
	}
	defer t.restore()
	keys := make(chan []byte)
	// Nothing interrupts a read of a terminal: it ends with the process.
	go readKeys(os.Stdin, keys)
	for said := "attached to"; ; said = "attached again to" {
		fmt.Fprintf(os.Stderr, "%s %s; Ctrl-] detaches\r\n", said, vm)
		err := viewConsole(ctx, vm, keys)
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			if errors.Is(err, errDetached) {
				t.restore()
				fmt.Fprintf(os.Stderr, "\ndetached from %s\n", vm)
				return nil
			}
			return err
		}
		fmt.Fprintf(os.Stderr, "\r\nthe daemon on %s has gone: waiting for it\r\n", vm.host.Name)
	}
}

var errDetached = errors.New("detached")

// viewConsole shows a console for as long as a connection lasts, and types keys into it.
func viewConsole(ctx context.Context, vm microVM, keys <-chan []byte) error {
	ctx, cancel := context.WithCancel(ctx)
	var typing sync.WaitGroup
	defer typing.Wait()
	defer cancel()
	var left error
	there := make(chan ingotv1.Host_ConsoleClient, 1)
	typing.Go(func() {
		// From now on, so that one can leave while nobody answers.
		if left = typeTo(ctx, there, keys); left != nil {
			cancel()
		}
	})
	stream, err := vm.host.Console(ctx, grpc.WaitForReady(true))
	if err == nil {
		err = stream.Send(&ingotv1.ConsoleRequest{Payload: &ingotv1.ConsoleRequest_Uid{Uid: vm.uid()}})
	}
	if err != nil && !errors.Is(err, io.EOF) { // of EOF, Recv has the reason
		cancel()
		typing.Wait()
		return cmp.Or(left, err)
	}
	there <- stream
	for {
		r, err := stream.Recv()
		if err == nil {
			if _, err = os.Stdout.Write(r.GetData()); err == nil {
				continue
			}
			return err
		}
		if errors.Is(err, io.EOF) {
			return nil // the guest has ended
		}
		ended := ctx.Err() != nil
		cancel()
		typing.Wait()
		if ended && left != nil {
			return left
		}
		return err
	}
}

// readKeys passes on what is typed, and closes keys at its end.
func readKeys(r io.Reader, keys chan<- []byte) {
	defer close(keys)
	for buf := make([]byte, 4<<10); ; {
		n, err := r.Read(buf)
		if n > 0 {
			keys <- bytes.Clone(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// typedAhead is how much may be typed before the console is there.
const typedAhead = 64 << 10

// typeTo sends what is typed, once the stream is there, until the detach key or the
// end of it, which are errDetached, or the end of ctx or of the stream, which are no
// error.
func typeTo(ctx context.Context, there <-chan ingotv1.Host_ConsoleClient, keys <-chan []byte) error {
	var stream ingotv1.Host_ConsoleClient
	var data []byte
	more := true
	for stream == nil {
		early := keys
		if !more || len(data) > typedAhead {
			early = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case stream = <-there:
		case typed, ok := <-early:
			if bytes.IndexByte(typed, detachKey) >= 0 {
				return errDetached
			}
			data, more = append(data, typed...), ok
		}
	}
	for {
		if len(data) == 0 && more {
			select {
			case <-ctx.Done():
				return nil
			case data, more = <-keys:
			}
		}
		at := bytes.IndexByte(data, detachKey)
		if at >= 0 {
			data = data[:at]
		}
		if len(data) > 0 {
			sent := stream.Send(&ingotv1.ConsoleRequest{Payload: &ingotv1.ConsoleRequest_Data{Data: data}})
			if sent != nil {
				return nil // Recv has the reason
			}
		}
		if at >= 0 || !more {
			return errDetached
		}
		data = nil
	}
}
