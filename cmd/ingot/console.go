package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

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
	stream, err := vm.host.Console(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&ingotv1.ConsoleRequest{Payload: &ingotv1.ConsoleRequest_Uid{Uid: vm.uid()}}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	t, err := rawTerminal()
	if err != nil {
		return fmt.Errorf("set up the terminal: %w", err)
	}
	defer t.restore()
	fmt.Fprintf(os.Stderr, "attached to %s; Ctrl-] detaches\r\n", vm)
	typed := make(chan error, 1)
	// Nothing interrupts a read of a terminal: it ends with the process.
	go func() { typed <- typeTo(stream, os.Stdin); cancel() }()
	for {
		r, err := stream.Recv()
		switch {
		case err == nil:
			if _, err := os.Stdout.Write(r.GetData()); err != nil {
				return err
			}
			continue
		case errors.Is(err, io.EOF):
			return nil // the guest has ended
		}
		select {
		case typeErr := <-typed: // we left it
			t.restore()
			fmt.Fprintf(os.Stderr, "\ndetached from %s\n", vm)
			return typeErr
		default:
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
}

// typeTo sends what is typed until the detach key or the end.
func typeTo(stream ingotv1.Host_ConsoleClient, r io.Reader) error {
	buf := make([]byte, 4<<10)
	for {
		n, err := r.Read(buf)
		data := buf[:n]
		at := bytes.IndexByte(data, detachKey)
		if at >= 0 {
			data = data[:at]
		}
		if len(data) > 0 {
			sent := stream.Send(&ingotv1.ConsoleRequest{Payload: &ingotv1.ConsoleRequest_Data{Data: bytes.Clone(data)}})
			if errors.Is(sent, io.EOF) {
				return nil
			}
			if sent != nil {
				return sent
			}
		}
		switch {
		case at >= 0, errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}
