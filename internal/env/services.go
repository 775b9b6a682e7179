package env

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/guest"
	images "ingot/internal/image/build"
)

// answerTime is how long the hub and hosts may take until they answer.
const answerTime = time.Minute

// awaitHub waits until the hub answers, and has it set its rules again, which it
// does when it starts, if somebody took one away.
func (u *up) awaitHub(ctx context.Context) (string, error) {
	var err error
	if u.conns, err = u.env.Dial(); err != nil {
		return "", err
	}
	client, name := ingotv1.NewHubClient(u.conns.Hub), u.env.Hub().Name
	var facts *ingotv1.HubFacts
	ask := func(ctx context.Context) error {
		facts, err = client.Facts(ctx, &emptypb.Empty{}, grpc.WaitForReady(true))
		return err
	}
	if err := await(ctx, name, ask); err != nil {
		return "", err
	}
	nat := facts.GetNat()
	if len(nat.GetMissing()) == 0 && nat.GetForwarding() {
		return "it answers, its rules are in force", nil
	}
	if err := u.lab.Restart(ctx, name, "hub"); err != nil {
		return "", err
	}
	return "it answers, its rules are set again", await(ctx, name, ask)
}

// awaitHosts waits until all hosts answer.
func (u *up) awaitHosts(ctx context.Context) (string, error) {
	group, ctx := errgroup.WithContext(ctx)
	for _, m := range u.env.Hosts() {
		client := v1alpha1.NewMicroVMClient(u.conns.Hosts[m.Name])
		group.Go(func() error {
			return await(ctx, m.Name, func(ctx context.Context) error {
				_, err := client.ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{}, grpc.WaitForReady(true))
				return err
			})
		})
	}
	return "all answer", group.Wait()
}

func await(ctx context.Context, machine string, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := ask(try)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not answer, see `ingot machine logs %s`: %w", machine, machine, err)
		case <-time.After(wait):
		}
	}
}

// provideImages builds and pushes the images that the registry has not got, or
// has of another build.
func (u *up) provideImages(ctx context.Context) (string, error) {
	init, err := guest.Init()
	if err != nil {
		return "", err
	}
	r := images.Registry{Address: u.env.RegistryAddress(), CAFile: u.env.CAFile(), User: "ingot", Password: string(u.token)}
	o := images.Options{Progress: func(s string) { u.say("  %s", s) }}
	stamp := imageStamp(init)
	pushed := filepath.Join(u.env.Dir(), "images")
	if b, err := os.ReadFile(pushed); err == nil && bytes.Equal(b, stamp) {
		there, err := images.Exists(ctx, r, "kernel")
		if err != nil {
			return "", err
		}
		if also, err := images.Exists(ctx, r, "busybox"); err == nil && there && also {
			return "kernel, busybox (there)", nil
		}
	}
	kernel, err := images.Kernel(ctx, o, init)
	if err == nil {
		_, err = images.Push(ctx, r, "kernel", kernel)
	}
	if err != nil {
		return "", err
	}
	busybox, err := images.Busybox(ctx, o)
	if err == nil {
		_, err = images.Push(ctx, r, "busybox", busybox)
	}
	if err != nil {
		return "", err
	}
	return "kernel, busybox (pushed)", writeFile(pushed, stamp)
}

// imageStamp names what our images are made of, so that a new guest program makes
// new images.
func imageStamp(init []byte) []byte {
	return fmt.Appendf(nil, "%x\n", sha256.Sum256(init))
}
