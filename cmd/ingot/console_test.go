package main

import (
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
	"ingot/internal/lab"
)

// TestOneCanLeaveAConsoleThatIsNotThere: the detach key is read also while nobody
// answers, after what was typed before.
func TestOneCanLeaveAConsoleThatIsNotThere(t *testing.T) {
	conn, err := grpc.NewClient("127.0.0.1:1", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	keys, ended := make(chan []byte), make(chan error, 1)
	go func() {
		ended <- viewConsole(t.Context(), microVM{&types.MicroVM{}, &hostClient{HostClient: ingotv1.NewHostClient(conn)}}, keys)
	}()
	for _, typed := range []string{"reboot\r", "x\x1d"} {
		select {
		case keys <- []byte(typed):
		case <-time.After(5 * time.Second):
			t.Fatalf("%q is not read", typed)
		}
	}
	select {
	case err := <-ended:
		if !errors.Is(err, errDetached) {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("it waits on")
	}
}

func TestRolesOf(t *testing.T) {
	m := lab.Machine{Name: "host-0", Roles: []lab.Role{{Name: "containerd"}, {Name: "flintlockd"}}}
	if all, err := rolesOf(m, ""); err != nil || len(all) != 2 {
		t.Errorf("%v, %v", all, err)
	}
	if one, err := rolesOf(m, "flintlockd"); err != nil || len(one) != 1 || one[0].Name != "flintlockd" {
		t.Errorf("%v, %v", one, err)
	}
	if _, err := rolesOf(m, "nosuch"); err == nil || err.Error() != "find role nosuch: not found: host-0 has containerd, flintlockd" {
		t.Error(err)
	}
}

func TestARoleThatNeverRan(t *testing.T) {
	if v := newRoleView(lab.RoleState{Name: "hub"}); v.Since != nil {
		t.Errorf("since %v", v.Since)
	}
	if v := newRoleView(lab.RoleState{Name: "hub", Since: time.Unix(1, 0)}); v.Since == nil || v.Since.Unix() != 1 {
		t.Errorf("since %v", v.Since)
	}
}
